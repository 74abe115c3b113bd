"""From a model's name to a folder with `config.json`, `tokenizer.json` and safetensors.

Runs in a process of its own before the shards start, with the network and the disk to itself.
Knows nothing of devices, ranks or precision.
"""

from headrace.hub.download import resolve
from headrace.hub.errors import HubError
from headrace.hub.main import main

__all__ = ["HubError", "main", "resolve"]
