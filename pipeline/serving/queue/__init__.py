"""The queue of the service in its database: records, claims and leases, the dispatcher, and webhook deliveries."""
