"""Views to features: backbones and heads."""
