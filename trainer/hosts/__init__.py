"""Several hosts that train one run together: who they are, how they meet, and what happens when one is gone."""
