"""The operations as functions, and what is O(N) in them."""
