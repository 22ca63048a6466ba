"""The known-concepts world: pictures whose concepts, places and causes are known, and networks trained on them."""
