"""The hands of the server: a shard owns one device and executes the router's plans."""
