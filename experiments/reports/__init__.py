"""Reports: tables, figures and pictures from plain results; nothing is measured here."""
