"""How a budget is split over layers and heads, one file each."""
