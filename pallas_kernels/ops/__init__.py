"""One file per operator: the public function, its definition in jnp, its XLA implementation and its gradients."""
