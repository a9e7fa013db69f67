"""The HTML page of a run: charts as inline SVG, nothing loaded from anywhere."""
