"""Plans whose heads go on evicting while tokens are generated, within a bound on bytes held."""
