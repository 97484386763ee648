"""Can the experts be merged? What their weights, routers and curvature say before a search."""
