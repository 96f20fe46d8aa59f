"""The neurons room: what filters, neurons and tokens see, how they group, and what they survive."""
