"""The HTTP interface: routes, access, requests and answers of the Videos API dialect. It renders nothing and starts
nothing; work waits in `queue`.
"""
