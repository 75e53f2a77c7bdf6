"""What may be done to a KV cache: methods, formats, allocators, the policy YAML and exporters."""
