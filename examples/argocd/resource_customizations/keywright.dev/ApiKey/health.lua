-- The health of an ApiKey, from its conditions: Ready is always there, Reconciling and Stalled only while true.

local health = {}
local status = obj.status or {}

-- What is said of an older spec is no news of this one.
if status.observedGeneration == nil or status.observedGeneration ~= obj.metadata.generation then
  health.status = "Progressing"
  health.message = "Waiting for Keywright to see this spec"
  return health
end

local conditions = {}
for _, condition in ipairs(status.conditions or {}) do
  conditions[condition.type] = condition
end
local ready, stalled = conditions["Ready"], conditions["Stalled"]

if stalled ~= nil and stalled.status == "True" then
  -- Nothing gets better by waiting: rejected, expired, or without its Secret.
  health.status = "Degraded"
  health.message = stalled.message
elseif ready ~= nil and ready.status == "True" then
  -- Also if inactive: that is what the spec asks for. "Suspended" would hold up all later sync waves until somebody
  -- activates the key.
  health.status = "Healthy"
  health.message = ready.message
else
  health.status = "Progressing"
  health.message = ready and ready.message or "Waiting for Keywright"
end
return health
