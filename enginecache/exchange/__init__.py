"""Engine files that come from elsewhere, and engines that go elsewhere: inspect, adopt, export, import."""
