"""Parts of `sbm_fast.optimize`: reading live forwards, finding chains in them, other classes."""
