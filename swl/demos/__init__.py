"""What the command ``swl train`` runs."""
