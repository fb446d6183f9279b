"""Studies: a configuration file each, run stage by stage into one report (`lorary reproduce`)."""
