"""One file per operator: Pallas bodies, functions of Refs that know no platform."""
