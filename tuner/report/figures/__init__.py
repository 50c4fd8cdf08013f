"""The plots of a report, as the data and layout that plotly.js draws. Pure."""
