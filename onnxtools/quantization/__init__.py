"""Number formats, scales and the Q/DQ nodes around products."""
