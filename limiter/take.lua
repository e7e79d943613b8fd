#!lua
-- One take: draws a request's costs from its buckets, from all of them or from none.
--
-- The shebang has no flags, so Redis refuses the whole script, before its first line, where it could not write: out of
-- memory, a read-only replica, too few replicas, a failed save.
--
-- KEYS are the buckets. ARGV has one packed string for each: the limit's rate (n tokens each p microseconds) and burst,
-- the cost in tokens, and what holds the others back: 0 a denial or trouble of this bucket, 1 a denial only,
-- 2 nothing (a shadow limit, which is taken by itself).
-- The reply is one string: the instant (7 bytes), and for each bucket in turn one byte of flags (1 allowed, 2 taken, 4 what was stored
-- made no sense, 8 trouble); then the tokens before the take, whole (4 bytes) and p-ths of one (6 bytes),
-- or the trouble's code (one byte of length, then the text).
--
-- All numbers are doubles, exact up to 2^53. The bounds, as the arguments and the stored states are held to them:
-- n <= 1e15 < 2^50, p < 2^45, tokens and burst <= 1e9 < 2^30, now < 2^53. The arithmetic is bucket.go's, line by line.

local MAGIC, VERSION = '\181\8', 1
-- magic, version, tokens, p-ths of a token, instant in microseconds, burst, n, p: 37 bytes, which with a key of
-- ordinary length Redis still keeps in one allocation. Whatever a later version changes, magic and version stay.
local STATE, STATE_SIZE = '>c2BI4I6I7I4I7I6', 37
local CHARGE, CHARGE_SIZE = '>I7I6I4I4B', 22
-- What is given back: as a charge, with the instant of the take in the place of what holds others back.
local GIFT, GIFT_SIZE = '>I7I6I4I4I7', 28

local MAX_N, MIN_P, MAX_P, MAX_TOKENS, MAX_TIME = 1e15, 1e6, 31622400000000, 1e9, 2^53
-- Milliseconds that a bucket is kept after it is full again: no rounding, and no lag between the clocks that Redis has for TIME and for
-- expiry, may end one that is not full.
local SLACK = 5000

-- muldiv returns floor(x*y/d) and the remainder, for x < d. Where x*y is below 2^53 plain division is exact: the quotient
-- is k - j/d for an integer k, at least 1/d below k, and a double rounds it up to k only where k*d > 2^53.
-- Else y is taken in eight limbs of 7 bits, from the top: r*128 and x*limb are below 2^45 * 2^7 = 2^52 each, so their sum
-- is below 2^53 and its division again exact; q stays at most the final quotient, which is below y.
local function muldiv(x, y, d)
  local product = x * y
  if product < 2^53 then
    local q = math.floor(product / d)
    return q, product - q * d
  end
  local q, r, unit = 0, 0, 2^49
  while unit >= 1 do
    local sum = r * 128 + x * (math.floor(y / unit) % 128)
    local digit = math.floor(sum / d)
    q, r = q * 128 + digit, sum - digit * d
    unit = unit / 128
  end
  return q, r
end

-- refill returns the level (tokens, p-ths) after some microseconds.
local function refill(tokens, frac, elapsed, burst, n, p)
  local room = burst - tokens
  local a = math.floor(elapsed / p)
  if a * n >= room then -- inexact only from 2^53 on, far above any room
    return burst, 0
  end
  local q, r = muldiv(elapsed - a * p, n, p)
  local arrived = a * n + q
  frac = frac + r
  if frac >= p then
    frac, arrived = frac - p, arrived + 1
  end
  if arrived >= room then
    return burst, 0
  end
  return tokens + arrived, frac
end

local function shape_ok(burst, n, p)
  return burst >= 1 and burst <= MAX_TOKENS and n >= 1 and n <= MAX_N and p >= MIN_P and p <= MAX_P
end

-- level returns what a bucket holds now: tokens, p-ths, whether a denied take must store that too, and whether what
-- was stored made no sense (it then counts as empty from now on). Of a newer version it returns nil.
local function level(raw, now, burst, n, p)
  if #raw == STATE_SIZE and string.sub(raw, 1, 2) == MAGIC and string.byte(raw, 3) == VERSION then
    local _, _, tokens, frac, at, old_burst, old_n, old_p = struct.unpack(STATE, raw)
    if shape_ok(old_burst, old_n, old_p) and tokens <= old_burst and frac < old_p and at < MAX_TIME and (tokens < old_burst or frac == 0) then
      local moved = false
      if now < at then
        moved = true
      else
        tokens, frac = refill(tokens, frac, now - at, old_burst, old_n, old_p)
      end
      if old_burst ~= burst or old_n ~= n or old_p ~= p then
        moved = true
        if tokens >= burst then
          tokens, frac = burst, 0
        else
          frac = muldiv(frac, p, old_p)
        end
      end
      return tokens, frac, moved, false
    end
  elseif #raw > 2 and string.sub(raw, 1, 2) == MAGIC and string.byte(raw, 3) > VERSION then
    return nil
  end
  return 0, 0, true, true
end

-- code is the first word of an error of Redis's. A command that the user may not run within a script has no word of its own.
local function code(err)
  if string.find(err, 'ACL failure in script', 1, true) or string.find(err, 'The user executing the script', 1, true) then
    return 'NOPERM'
  end
  return string.sub(string.match(err, '^%S*'), 1, 255)
end

-- store writes a bucket: one SET, which sets its value and its end together. It returns Redis's answer.
local function store(key, tokens, frac, now, burst, n, p)
  -- A float's error in the microseconds until the bucket is full is far below the slack.
  local full = math.ceil(((burst - tokens) * p - frac) / n / 1000)
  return redis.pcall('SET', key, struct.pack(STATE, MAGIC, VERSION, tokens, frac, now, burst, n, p), 'PX', string.format('%.0f', full + SLACK))
end

local function take(now)
  -- Check every argument before anything is read.
  local count = #KEYS
  if count < 1 or #ARGV ~= count then
    return redis.error_reply('SLUICE one argument for each key, and at least one key')
  end
  local ns, ps, bursts, costs, holds = {}, {}, {}, {}, {}
  for i = 1, count do
    if #ARGV[i] ~= CHARGE_SIZE then
      return redis.error_reply('SLUICE an argument is not ' .. CHARGE_SIZE .. ' bytes')
    end
    local n, p, burst, cost, hold = struct.unpack(CHARGE, ARGV[i])
    if not shape_ok(burst, n, p) or hold > 2 then
      return redis.error_reply('SLUICE an argument is out of range')
    end
    ns[i], ps[i], bursts[i], costs[i], holds[i] = n, p, burst, cost, hold
  end

  -- Read all buckets before anything is written.
  local tokens, fracs, moved, flags, trouble = {}, {}, {}, {}, {}
  local all = true
  for i = 1, count do
    flags[i] = 0
    local raw = redis.pcall('GET', KEYS[i])
    local nonsense
    if not raw then
      tokens[i], fracs[i] = bursts[i], 0
    elseif type(raw) == 'string' then
      tokens[i], fracs[i], moved[i], nonsense = level(raw, now, bursts[i], ns[i], ps[i])
      if not tokens[i] then
        trouble[i] = 'NEWER'
      end
    elseif string.sub(raw.err, 1, 9) == 'WRONGTYPE' then
      tokens[i], fracs[i], moved[i], nonsense = 0, 0, true, true
    else
      trouble[i] = code(raw.err)
    end
    if nonsense then
      flags[i] = 4
    end
    if trouble[i] then
      all = all and holds[i] ~= 0
    elseif tokens[i] >= costs[i] then
      flags[i] = flags[i] + 1
    elseif holds[i] ~= 2 then
      all = false
    end
  end

  -- Write, one SET a bucket, which sets its value and its end together. What a denied take finds is not stored,
  -- or rounding would add up; but for a moved bucket, which would else stand still.
  local reply = {}
  for i = 1, count do
    if not trouble[i] then
      local n, p, burst, left, frac = ns[i], ps[i], bursts[i], tokens[i], fracs[i]
      if flags[i] % 2 == 1 and (all or holds[i] == 2) then
        left = left - costs[i]
        flags[i] = flags[i] + 2
      end
      if left < tokens[i] or moved[i] then
        local done = store(KEYS[i], left, frac, now, burst, n, p)
        if done.err then -- the buckets before it stay charged: tokens lost, never given
          trouble[i] = code(done.err)
        end
      end
    end
    if trouble[i] then
      reply[i] = struct.pack('>BBc0', 8, #trouble[i], trouble[i])
    else
      reply[i] = struct.pack('>BI4I6', flags[i], tokens[i], fracs[i])
    end
  end
  return struct.pack('>I7', now) .. table.concat(reply)
end

-- give puts back what a request took from these buckets and then did not need, as another node's bucket denied it. Put back whole it
-- would break the bound: meanwhile the bucket refilled, and had it been full it would have lost what came. So what refilled since the
-- take is kept back; where the clock went back, all of it. An absent bucket is full.
local function give(now)
  if #ARGV ~= #KEYS then
    return redis.error_reply('SLUICE one argument for each key')
  end
  for i = 1, #KEYS do
    if #ARGV[i] ~= GIFT_SIZE then
      return redis.error_reply('SLUICE an argument is not ' .. GIFT_SIZE .. ' bytes')
    end
    local n, p, burst, cost, at = struct.unpack(GIFT, ARGV[i])
    if not shape_ok(burst, n, p) or cost > burst then
      return redis.error_reply('SLUICE an argument is out of range')
    end
    if now >= at then
      local tokens, frac = refill(0, 0, now - at, cost, n, p) -- of the cost, what refilled since
      tokens, frac = cost - tokens, -frac
      if frac < 0 then
        tokens, frac = tokens - 1, frac + p
      end
      local raw = redis.pcall('GET', KEYS[i])
      if (tokens > 0 or frac > 0) and type(raw) == 'string' then
        local held, part, _, nonsense = level(raw, now, burst, n, p)
        if held and not nonsense then
          tokens, frac = held + tokens, part + frac
          if frac >= p then
            tokens, frac = tokens + 1, frac - p
          end
          if tokens >= burst then
            tokens, frac = burst, 0
          end
          store(KEYS[i], tokens, frac, now, burst, n, p)
        end
      end
    end
  end
  return ''
end

