"""MusicRL-JAX: finetune text-to-music models on what listeners like."""
