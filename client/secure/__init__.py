"""A client's part in a secure sum: keys, masks, shares of its secrets, and the order in which it gives them out."""
