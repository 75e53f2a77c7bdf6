"""What a policy loses: replay, Gram tables, and the way from predicted to live loss."""
