"""Folders and object stores: reading, writing, retries, accepted paths and URLs, secrets in texts, models by URL."""
