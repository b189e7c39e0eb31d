"""The stages: the only place that joins the other rooms."""
