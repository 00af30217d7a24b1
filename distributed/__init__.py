"""Several processes that train one network: starting them, their exchanges, their failures."""
