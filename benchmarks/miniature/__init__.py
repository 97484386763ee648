"""The paper in miniature: small models, small domains, every study of the paper."""
