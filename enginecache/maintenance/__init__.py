"""Operations on a cache as a whole: inspect, evict, verify, repair, diagnose."""
