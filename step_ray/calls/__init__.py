"""What stands between an episode and an endpoint: addresses, limits, money, kept replies."""
