"""What is shown to people: model cards, one HTML page, plots, tables, and making it all again."""
