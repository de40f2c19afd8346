"""The search for the best cuts."""
