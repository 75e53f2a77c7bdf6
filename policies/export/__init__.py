"""From a policy to a serving stack and back: the contract, its exporters, importers."""
