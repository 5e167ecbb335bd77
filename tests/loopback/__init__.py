"""Real servers on loopback that speak the protocols of search services and image hosts, well or badly."""
