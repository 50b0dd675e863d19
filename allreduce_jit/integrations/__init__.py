"""Other projects' names and contracts over our communicator."""
