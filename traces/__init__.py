"""What the model attends to: the model store, workloads, capture and the trace format."""
