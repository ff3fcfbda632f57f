"""What becomes of the router when whole experts go, and edits of what it says."""
