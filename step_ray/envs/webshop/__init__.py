"""WebShop: a simulator of our own on the official data format, with the official rules."""
