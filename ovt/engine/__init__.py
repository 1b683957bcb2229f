"""The engines turn an instance's description into processes; container/ is one, each stands behind base.Engine."""
