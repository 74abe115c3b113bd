"""Headrace: the shard, which executes the plans of the router on one device."""
