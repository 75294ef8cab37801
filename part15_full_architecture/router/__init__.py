"""A server in front of several replicas: it chooses one for each request, and passes the answer through."""
