"""What a stage between any two cuts costs, in FLOPs and bytes."""
