"""Why sparse training works where it does: the papers' claims about loss landscapes, a module each."""
