"""What the hardware and the model are: GPU profiles and model shapes."""
