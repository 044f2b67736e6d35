"""What travels between the parts: Polygon's messages, our events, raw records, topics, tables."""
