"""Start the processes of a run, exchange data between them, and detect their failures."""
