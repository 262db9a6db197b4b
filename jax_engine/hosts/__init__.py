"""One engine over several processes: how they meet, who leads, and what the others do."""
