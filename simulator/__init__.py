"""What a policy costs and loses: replay, Gram tables, memory and latency."""
