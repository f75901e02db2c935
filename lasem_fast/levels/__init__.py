"""What tree and backends say to each other: plans, levels, folded tensors, live rows."""
