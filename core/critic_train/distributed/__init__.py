"""The processes of one run: how they start, find each other, exchange values and end together. No models here."""
