"""What people look at: tables for a terminal, and one self-contained HTML page."""
