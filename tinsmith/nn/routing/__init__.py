"""What layers with a router share: gates, dispatch, experts, balance."""
